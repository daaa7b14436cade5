"""From scores to differences and how sure they are."""
