"""Breaks of cges_kernels/compaction, which makes smaller networks that compute the same."""

from .mutant import Mutant

FOLDER = "cges_kernels/compaction"

MUTANTS = (
    Mutant(
        "a fold takes the weights when they are gone",
        f"{FOLDER}/fold.py",
        old="""\
        taps = columns[self.inputs]
        columns[self.inputs] = 0
""",
        new="""\
        columns[self.inputs] = 0
        taps = columns[self.inputs]
""",
        seen_by=("test_constants", "test_compact"),
    ),
    Mutant(
        "what a group of a convolution reads may leave without it",
        f"{FOLDER}/products.py",
        old="for ids in (line, made):",
        new="for ids in (made,):",
        seen_by=("test_kept_layers",),
    ),
    Mutant(
        "a convolution keeps its number of groups",
        f"{FOLDER}/layers.py",
        old="groups = shape[0] // (before // groups)",
        new="groups = before // (before // groups)",
        seen_by=("test_kept_layers",),
    ),
    Mutant(
        "constants are folded in front of zero padding",
        f"{FOLDER}/fold.py",
        old="plain = not _pads_with_zeros(layer) and takes",
        new="plain = takes",
        seen_by=("test_constants",),
    ),
    Mutant(
        "what swallows NaN is a constant",
        f"{FOLDER}/unknown.py",
        old="for y in (found.get(name, x), *others):",
        new="for y in others:",
        seen_by=("test_constants",),
    ),
    Mutant(
        "constants are those of one size",
        f"{FOLDER}/unknown.py",
        old="narrow(math.inf, enlarged(given) if resized is None else resized)",
        new="narrow(math.inf, given)",
        seen_by=("test_wider",),
    ),
    Mutant(
        "a dead layer loses all of its channels",
        f"{FOLDER}/cutting.py",
        old="if bool(gone[lines].all()) and not spared.keys() & set(lines.tolist()):",
        new="if not len(lines) and not spared.keys() & set(lines.tolist()):",
        seen_by=("test_compact",),
    ),
    Mutant(
        "what is added goes one without the other",
        f"{FOLDER}/rules.py",
        old="            f.channels.join(lead, ids, why)\n",
        new="",
        seen_by=("test_compact",),
    ),
    Mutant(
        "layers of one recurrent module have sizes of their own",
        f"{FOLDER}/following.py",
        old="    _hold_recurrent(channels, model)\n",
        new="",
        seen_by=("test_kept*",),
    ),
    Mutant(
        "forward passes change buffers for good",
        f"{FOLDER}/running.py",
        old="                x.copy_(value)\n",
        new="                pass\n",
        seen_by=("test_adverse*",),
    ),
    Mutant(
        "frozen weights train after all",
        f"{FOLDER}/copies.py",
        old="                p.requires_grad_(like.requires_grad)\n",
        new="                p.requires_grad_(True)\n",
        seen_by=("test_compact",),
    ),
    Mutant(
        "loading changes the network it is given",
        f"{FOLDER}/saving.py",
        old="small = copy.deepcopy(model)",
        new="small = model",
        seen_by=("test_compact_files",),
    ),
    Mutant(
        "the result has no hooks",
        f"{FOLDER}/compact.py",
        old="    restore_hooks(result.model, model)\n",
        new="",
        seen_by=("test_forms",),
    ),
)
