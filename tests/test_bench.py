"""The measurements of bench.py: that they measure what they say."""

import pytest

import bench

TINY = ["--model", "toy", "--size", "8", "--batch", "2", "--repeats", "1", "--dtype", "fp32"]


def test_every_method_is_timed():
    args = bench.parse_args(TINY)
    times = bench.seconds(args)
    assert times.keys() == bench.METHODS.keys() and all(0 < t < 60 for t in times.values())


@pytest.mark.parametrize("name", bench.METHODS)
def test_evaluations_and_copies_are_those_of_the_table(name):
    method = bench.Method(bench.parse_args(TINY), name)
    _, evaluations, further = bench.METHODS[name]
    nets = [method.run.net, method.run.ema, *(p for p in method.run.parts.values() if hasattr(p, "register_buffer"))]
    calls = []
    for net in nets:
        net.register_forward_hook(lambda *_: calls.append(1))
    method()
    assert len(calls) == evaluations
    assert len(nets) - 2 == (further != "–")


@pytest.mark.parametrize("flags", [["--size", "9"], ["--batch", "0"], ["--repeats", "0"]])
def test_sizes_that_can_not_be_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args([*TINY, *flags])
    assert "--size" in capsys.readouterr().err
