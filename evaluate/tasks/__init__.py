"""Tasks: DataComp's 40 entries as YAML."""
