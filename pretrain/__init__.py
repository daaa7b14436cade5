"""Pretraining: a subset of a pool in, a checkpoint out. The rooms above come in through `winnow.pretrain.encoder`."""
