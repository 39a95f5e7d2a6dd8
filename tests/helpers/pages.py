"""The code of the README and of the pages in docs/, and a network for it to train."""

import re

from helpers.programs import ROOT
from torch import nn


def blocks(page):
    """The Python code blocks of a page, such as "docs/groups.md"."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


class Net(nn.Module):
    """Two convolutions and two linear layers, for images of 1x8x8 and three classes."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc1, self.fc2 = nn.Linear(6 * 4 * 4, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu()).relu().flatten(1)
        return self.fc2(self.fc1(x).relu())
