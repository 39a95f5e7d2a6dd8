"""Where a scenario is noted: a function of a constructor that returns the tensors to compare."""

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function
