"""The table of scenarios. A scenario is a function of a constructor that returns the tensors to compare."""

SCENARIOS = {}


def scenario(function):
    """Registers a scenario under its own name."""
    SCENARIOS[function.__name__] = function
    return function
