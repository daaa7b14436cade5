"""Trees of filters: parsing, fitting, applying, counting."""
