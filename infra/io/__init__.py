"""Files: storage, parquet and Arrow helpers, images, tars, prefetching."""
