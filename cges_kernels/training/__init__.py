"""From a model to param groups, and what changes while it trains."""
