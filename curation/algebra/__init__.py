"""Trees of filters: parsing, fitting, evaluation, counts."""
