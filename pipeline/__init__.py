"""Top floor: the recipe, the stage graph, the command line."""
