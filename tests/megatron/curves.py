"""Comparisons of whole `pretrain()` runs, with megamoe and with alltoall, for rows of the matrix tests."""

import functools

import pytest

from tests.megatron import tiny

EP1, EP2, EP4 = (("--expert-model-parallel-size", str(size)) for size in (1, 2, 4))
PP2 = ("--pipeline-model-parallel-size", "2")
OVERLAPPED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


@functools.cache
def alltoall(*arguments) -> tiny.Curve:
    """Megatron's own curve, the same for every row that asks for it in one process."""
    return tiny.train(*arguments, dispatcher="alltoall")


def same_curve(folder, arguments, ours_too=(), tolerance=2e-6, norm_tolerance=2e-5):
    """`ours_too`: settings that must not change the curve, which only our run has."""
    theirs, ours = alltoall(*arguments), tiny.train(*arguments, *ours_too)
    if tiny.prints():
        assert len(theirs.losses) == 4 and theirs.losses[-1] < theirs.losses[0]  # it trains
    tiny.assert_same(ours, theirs, tolerance, norm_tolerance)


def stale_weights(folder):
    """--overlap-param-gather: equal to alltoall, and the check is one that fails without the children's pre-hooks.

    The all-gather of a module's parameters is awaited in its forward pre-hook. Nothing else tells that it is missing:
    training goes on, on old weights.
    """
    from megamoe_train.megatron import experts

    arguments = (*EP2, *OVERLAPPED)  # on 4 ranks: experts have gradient buckets of their own, which 2 ranks share
    theirs, ours = alltoall(*arguments), tiny.train(*arguments)
    fire, experts.fire_forward_pre_hooks = experts.fire_forward_pre_hooks, lambda module: None
    try:
        stale = tiny.train(*arguments)
    finally:
        experts.fire_forward_pre_hooks = fire
    tiny.assert_same(ours, theirs)
    if tiny.prints():
        with pytest.raises(AssertionError, match="losses"):
            tiny.assert_same(stale, theirs, tolerance=1e-4)


def resumed(folder, *, saved, loaded, save_on=EP2, load_on=EP2):
    """Four steps with one dispatcher, a checkpoint after two; from it two more with another: the same last two steps.

    Resumed are weights, optimizer state, the place in the data and the random numbers.
    """
    place = str(folder / "checkpoint")
    shared = ("--ckpt-format", "torch_dist")
    whole = tiny.train(*save_on, *shared, "--save", place, "--save-interval", "2", dispatcher=saved)
    resume = ("--load", place, "--ckpt-step", "2", "--exit-on-missing-checkpoint")
    rest = tiny.train(*load_on, *shared, *resume, dispatcher=loaded)
    if tiny.prints():
        assert len(rest.losses) == 2
    tiny.assert_same(rest, tiny.Curve(whole.losses[2:], whole.norms[2:], whole.validation))


def weights_alone(folder):
    """From EP=2 to EP=1 Megatron does not carry Adam's state, whose groups are of dense or expert weights.

    The weights carry over: the third step has the loss it had, and the fourth is that of alltoall started the same way.
    (optimizer.py:640: the group of expert weights does not exist at EP=1.)
    """
    place = ("--ckpt-format", "torch_dist", "--save", str(folder / "checkpoint"), "--save-interval", "2")
    whole = tiny.train(*EP2, *place, dispatcher="alltoall")
    resume = (*EP1, *place[:2], "--load", place[3], "--ckpt-step", "2", "--no-load-optim")
    theirs, ours = (tiny.train(*resume, dispatcher=name) for name in ("alltoall", "megamoe"))
    tiny.assert_same(ours, theirs)
    tiny.assert_same(tiny.Curve(ours.losses[:1]), tiny.Curve(whole.losses[2:3]))


def row(*arguments, **limits):
    """A row that compares the curves of these command-line arguments."""
    return functools.partial(same_curve, arguments=arguments, **limits)
