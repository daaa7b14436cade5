"""The recipe: one YAML file for a whole experiment."""
