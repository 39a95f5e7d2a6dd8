"""The mathematics and what it is told: imports nobody else of this package."""
