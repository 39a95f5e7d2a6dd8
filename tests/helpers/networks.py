"""Small networks for compact(), one for each way in which channels are coupled."""

import torch
import torch.nn.functional as F
from helpers.compacting import conv, net
from torch import nn

from examples.common.networks import LeNet


def residual():
    """Sums of residual blocks, with and without a convolution in the shortcut."""

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn3(self.conv2(F.relu(self.bn2(self.conv1(x))))))
        x = F.relu(self.bn5(self.conv4(F.relu(self.bn4(self.conv3(x))))) + self.bn6(self.short(x)))
        return self.fc(x.mean((2, 3)))

    def block(i, o, size=3, **options):
        return conv(i, o, size, bias=False, padding=size // 2, **options)

    return net(
        forward,
        stem=block(3, 10),
        bn1=nn.BatchNorm2d(10),
        conv1=block(10, 8),
        bn2=nn.BatchNorm2d(8),
        conv2=block(8, 10),
        bn3=nn.BatchNorm2d(10),
        conv3=block(10, 12, stride=2),
        bn4=nn.BatchNorm2d(12),
        conv4=block(12, 14),
        bn5=nn.BatchNorm2d(14),
        short=block(10, 14, 1, stride=2),
        bn6=nn.BatchNorm2d(14),
        fc=nn.Linear(14, 5),
    )


def concatenation():
    """Concatenated channels, as in a DenseNet, and two branches joined in reverse order."""

    def forward(self, x):
        x = F.relu(self.stem(x))
        for layer in self.dense:
            x = torch.cat([x, F.relu(layer(x))], 1)
        a, b = self.left(x), self.right(x)
        return self.head(torch.cat([b, a], 1)).flatten(1)

    dense = nn.ModuleList([conv(6, 5, padding=1), conv(11, 5, padding=1)])
    layers = {"left": conv(16, 8), "right": conv(16, 7), "head": conv(15, 4)}
    return net(forward, stem=conv(3, 6), dense=dense, **layers)


def concatenated_input():
    """Channels concatenated with the model's input, which has to keep its own."""

    def forward(self, x):
        return self.head(torch.cat([x, F.relu(self.body(x))], 1))

    return net(forward, body=conv(3, 6, padding=1), head=conv(9, 4))


def depthwise():
    """Depthwise convolutions between pointwise ones, as in a MobileNet, then a flattened Linear."""

    def block(i, o):
        return [
            nn.Conv2d(i, i, 3, groups=i, padding=1, bias=False),
            nn.BatchNorm2d(i),
            nn.ReLU6(),
            conv(i, o, 1),
        ]

    return nn.Sequential(
        conv(3, 12),
        nn.BatchNorm2d(12),
        nn.Hardswish(),
        *block(12, 16),
        *block(16, 8),
        nn.Flatten(),
        nn.Linear(8 * 64, 4),
    )


def squeeze_and_excite():
    """Channels scaled by a gate that is computed from the same channels."""

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.head(x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))

    return net(forward, conv=conv(3, 12), down=conv(12, 6, 1), up=conv(6, 12, 1), head=conv(12, 4))


def padded_shortcut():
    """A shortcut padded with zero channels in front and behind."""

    def forward(self, x):
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.fc((short + self.conv(x)).mean((2, 3)))

    return net(
        forward, stem=conv(3, 8, padding=1), conv=conv(8, 12, stride=2, padding=1), fc=nn.Linear(12, 4)
    )


def transformer():
    """A transformer's encoder layer between two Linears."""
    layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3))


def embedded():
    """An embedding in front of three Linears."""

    def forward(self, tokens):
        return self.c(F.relu(self.b(F.relu(self.a(self.embedding(tokens))).mean(1))))

    linear = {"a": (8, 12), "b": (12, 9), "c": (9, 3)}
    layers = {name: nn.Linear(*size) for name, size in linear.items()}
    return net(forward, embedding=nn.Embedding(20, 8), **layers)


def flattened_last():
    """A Flatten whose channels are innermost."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3))


def reused():
    """A layer that is called twice."""

    def forward(self, x):
        x = F.relu(self.first(x))
        for _ in range(2):
            x = F.relu(self.again(x))
        return self.last(F.relu(self.middle(x)))

    linear = {"first": (4, 9), "again": (9, 9), "middle": (9, 11), "last": (11, 3)}
    return net(forward, **{name: nn.Linear(*size) for name, size in linear.items()})


def tied():
    """Two layers that share a weight."""
    model = nn.Sequential(
        *(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU()),
        *(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)),
    )
    model[4].weight = model[2].weight
    return model


def mixing():
    """Operations that mix all channels: softmax, mean, and maximum."""

    def forward(self, x):
        a = self.a(x).softmax(1)
        b = F.relu(self.b(a))
        return self.c(b - b.mean(1, keepdim=True)), F.relu(self.d(x)).amax(1), self.e(F.relu(self.f(x)))

    names = {"a": (3, 8), "b": (8, 8), "c": (8, 3), "d": (3, 8), "f": (3, 8), "e": (8, 3)}
    return net(forward, **{name: conv(*size, 1) for name, size in names.items()})


def functional():
    """A weight used by its module and by F.linear, and one used by F.linear only."""

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x) + F.linear(x, self.b.weight), F.linear(F.relu(self.d(x)), self.c.weight)

    names = {"a": (4, 8), "b": (8, 3), "d": (8, 9), "c": (9, 3)}
    return net(forward, **{name: nn.Linear(*size) for name, size in names.items()})


IMAGE = (2, 3, 10, 10)


# name: (the network, the shape of an example, whether it must get smaller). None stands for a network that
# may or may not, depending on which zeros are drawn.
ZOO = {
    "lenet": (lambda: LeNet(8), (2, 1, 8, 8), True),
    "pooled": (lambda: LeNet(28), (1, 1, 28, 28), True),
    "residual": (residual, IMAGE, True),
    "concatenation": (concatenation, IMAGE, True),
    "concatenated input": (concatenated_input, IMAGE, None),
    "depthwise": (depthwise, IMAGE, True),
    "squeeze and excite": (squeeze_and_excite, IMAGE, True),
    "padded shortcut": (padded_shortcut, IMAGE, True),
    "transformer": (transformer, (2, 6, 5), True),
    "embedded": (embedded, None, True),
    "flattened last": (flattened_last, (2, 5, 4), None),
    "reused": (reused, (5, 4), True),
    "tied": (tied, (5, 6), True),
    "mixing": (mixing, IMAGE, True),
    "functional": (functional, (5, 4), None),
    "grouped": (
        lambda: nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 8, groups=2), nn.ReLU(), conv(8, 9), conv(9, 4, 1)
        ),
        (2, 3, 10, 10),
        True,
    ),
    "transposed": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 9, 3, 2), nn.ReLU(), conv(9, 4)),
        IMAGE,
        True,
    ),
    "normalised": (
        lambda: nn.Sequential(
            *(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 8), nn.InstanceNorm2d(8), nn.PReLU(8), conv(8, 9)),
            *(nn.PReLU(), nn.Dropout(), conv(9, 4, 1)),
        ),
        (2, 3, 10, 10),
        True,
    ),
    "circular": (
        lambda: nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 4, padding=1, padding_mode="circular")),
        IMAGE,
        True,
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ELU(), nn.Conv1d(8, 4, 3)),
        (2, 3, 9),
        True,
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 8, 2), nn.ELU(), nn.Conv3d(8, 4, 2)),
        (2, 1, 4, 4, 4),
        True,
    ),
    "recurrent": (
        lambda: net(lambda self, x: self.b(self.a(x)[0]), a=nn.LSTM(4, 6), b=nn.Linear(6, 3)),
        (3, 2, 4),
        None,  # a unit can be removed only if all weights that produce it happen to be zero
    ),
}
