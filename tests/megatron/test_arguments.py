"""Our options in Megatron's own parser: names of the dispatcher, flat YAML, what is refused."""

import argparse
import sys

import pytest
import torch

from megamoe_train import install
from megamoe_train.megatron import arguments
from megamoe_train.megatron import install as installation


@pytest.fixture(autouse=True)
def options_restored():
    yield
    install(backend="auto", recompute=None, experts="paired", sizing="high_water", capacity=0)


@pytest.fixture
def parse(monkeypatch):
    """`parse("--a", ...)`: Megatron's own parse_args on that command line."""
    from megatron.training import arguments as theirs

    install()

    def parse_args(*words, **kwargs):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        return theirs.parse_args(**kwargs)

    return parse_args


@pytest.fixture
def refused(parse, capsys):
    """`refused("text", "--a", ...)`: the command line is refused with argparse's exit code and one line with `text`."""

    def check(text, *words, **kwargs):
        with pytest.raises(SystemExit) as end:
            parse(*words, **kwargs)
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and text in lines[-1], lines[-1]

    return check


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        (tmp_path / "flat.yaml").write_text(text)
        return tmp_path / "flat.yaml"

    return write


def test_both_names_choose_the_dispatcher(parse):
    assert parse("--moe-dispatcher", "megamoe").moe_token_dispatcher_type == "megamoe"
    assert parse("--moe-token-dispatcher-type", "megamoe").moe_token_dispatcher_type == "megamoe"
    both = parse("--moe-dispatcher", "megamoe", "--moe-token-dispatcher-type=megamoe")
    assert both.moe_token_dispatcher_type == "megamoe"
    assert parse("--moe-dispatcher", "alltoall").moe_token_dispatcher_type == "alltoall"


def test_neither_name_leaves_megatrons_default(parse):
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert parse().moe_token_dispatcher_type == TransformerConfig.moe_token_dispatcher_type


def test_two_dispatchers_contradict(refused):
    message = "--moe-dispatcher megamoe contradicts --moe-token-dispatcher-type alltoall"
    refused(message, "--moe-dispatcher", "megamoe", "--moe-token-dispatcher-type", "alltoall")
    # Also where the value is the default of Megatron, which a comparison with the default would miss.
    refused("contradicts", "--moe-dispatcher", "megamoe", "--moe-token-dispatcher-type", "allgather")


def test_unknown_dispatcher_lists_the_allowed(refused):
    refused("'megamoe'", "--moe-dispatcher", "mega")


def test_options_reach_the_layers_to_come(parse):
    parse("--megamoe-backend", "reference", "--megamoe-recompute", "fc1", "--megamoe-experts", "staged")
    assert installation.options() == installation.Options("reference", "fc1", "staged")
    parse("--megamoe-sizing", "fixed", "--megamoe-capacity", "2560")
    assert installation.options() == installation.Options("reference", "fc1", "staged", None, None, "fixed", 2560)


def test_a_capacity_that_cannot_be_is_refused(refused):
    refused("capacity: got 100 with sizing='fixed'", "--megamoe-sizing", "fixed", "--megamoe-capacity", "100")
    refused("capacity: got 0 with sizing='fixed'", "--megamoe-sizing", "fixed")
    refused("capacity: got 128 with sizing='high_water'", "--megamoe-capacity", "128")


def test_options_not_given_leave_what_the_script_installed(parse):
    install(backend="reference", experts="staged")
    parse("--megamoe-experts", "paired")
    assert installation.options() == installation.Options(backend="reference")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: there nccl is the right default")
def test_without_a_gpu_the_default_backend_is_one_that_works(parse):
    assert parse().distributed_backend == "gloo"
    assert parse("--distributed-backend", "nccl").distributed_backend == "nccl"


def test_a_script_that_adds_its_own_and_ours_gets_ours_once(parse):
    def provider(parser):
        parser.add_argument("--own", type=int)
        return arguments.add_arguments(parser)

    args = parse("--own", "3", "--moe-dispatcher", "megamoe", extra_args_provider=provider)
    assert (args.own, args.moe_token_dispatcher_type) == (3, "megamoe")


def test_flat_yaml_is_the_command_line(parse, yaml_file):
    path = yaml_file(
        "moe-dispatcher: megamoe\nnum-layers: 3\nlr: 1.5e-4\nmin_lr: -1.0e-5\nbf16: true\nswiglu: false\n"
        "recompute-modules: [moe, core_attn]\nsave: /some/where\nown-list: [1, 2]\n"
    )

    def provider(parser):
        parser.add_argument("--own-list", nargs="+", type=int)
        return parser

    args = parse("--megamoe-config", path, extra_args_provider=provider)
    assert (args.moe_token_dispatcher_type, args.num_layers, args.lr, args.min_lr) == ("megamoe", 3, 1.5e-4, -1e-5)
    assert args.bf16 and not args.swiglu and args.save == "/some/where"
    assert (args.recompute_modules, args.own_list) == (["moe", "core_attn"], [1, 2])


def test_the_command_line_wins_over_yaml_wherever_it_stands(parse, yaml_file):
    path = yaml_file("num-layers: 3\nseed: 5\n")
    for words in (["--num-layers", "4", "--megamoe-config", path], [f"--megamoe-config={path}", "--num-layers", "4"]):
        args = parse(*words)
        assert (args.num_layers, args.seed) == (4, 5)


def test_yaml_and_command_line_may_not_contradict_on_the_dispatcher(refused, yaml_file):
    refused(
        "contradicts", "--megamoe-config", yaml_file("moe-dispatcher: megamoe\n"), "--moe-token-dispatcher-type", "flex"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num-layerz: 3\n", "unknown key 'num-layerz'"),
        ("megamoe-config: other.yaml\n", "unknown key 'megamoe-config'"),
        ("num-layers: 3\nnum-layers: 4\n", "key 'num-layers' is given twice"),
        ("language_model:\n  num_layers: 3\n", "language_model: got {'num_layers': 3}; allowed: one value"),
        ("num-layers: {a: 3}\n", "num-layers: got {'a': 3}; allowed: one value"),
        ("num-layers:\n", "num-layers: got None; allowed: one value"),
        ("num-layers: [1, 2]\n", "num-layers: got [1, 2]; allowed: one value"),
        ("bf16: 1\n", "bf16: got 1; allowed: true or false"),
        ("- num-layers\n", "got list; allowed: lines of `key: value`"),
        ("a: [\n", "flat.yaml"),
        ("num-layers: many\n", "invalid int value: 'many'"),
    ],
)
def test_bad_yaml_is_one_clear_error(refused, yaml_file, text, message):
    # A script that ignores unknown arguments does not make a misspelt key disappear.
    refused(message, "--megamoe-config", yaml_file(text), ignore_unknown_args=True)


def test_missing_yaml_is_one_clear_error(refused, tmp_path):
    refused("No such file", "--megamoe-config", tmp_path / "none.yaml")


def test_megatrons_nested_yaml_is_refused(refused, yaml_file):
    refused("nested YAML drops the keys it does not know", "--yaml-cfg", yaml_file("world_size: 1\n"))


def test_a_flag_with_a_negative_form_takes_it(yaml_file):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--strict", action="store_true")
    path = yaml_file("cache: false\nstrict: false\n")
    assert arguments.expand_yaml(["--megamoe-config", str(path), "--strict"], parser) == ["--no-cache", "--strict"]
