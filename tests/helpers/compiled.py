"""For tests of torch.compile: shapes, options, and marks.

The marks let each test begin with nothing compiled, and silence Dynamo's warnings.
"""

import pytest

SHAPES = [(9, 7), (20,), (5, 3, 2, 2)]
SGD = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
PENALTY = dict(group_lasso=0.3, exclusive_lasso=0.05, l1=0.1)
COMPILES = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Dynamo warns about profiler records
]
