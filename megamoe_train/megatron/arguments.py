"""Command line and YAML: our options in Megatron's parser, refused early where they contradict each other.

`patch_parser()` makes every parser that Megatron builds know them. `add_arguments` does it for one parser, and is an
`extra_args_provider`. Our YAML (`--megamoe-config FILE.yaml`) is flat: each `key: value` becomes `--key value`, before
the rest of the command line, which wins. Megatron's nested `--yaml-cfg` drops unknown keys in silence: refused.
"""

import argparse
import functools
import sys

import torch

from megamoe_train.config import BACKENDS
from megamoe_train.megatron import flat_yaml, workspaces
from megamoe_train.megatron.install import EXPERTS, NAME, install, options
from megamoe_train.megatron.validate import validate
from megamoe_train.workspace import SIZINGS

CONFIG_OPTION = flat_yaml.OPTION
GROUP = "megamoe_train"  # of our options, in --help
GIVEN = ("backend", "recompute", "experts", "sizing", "capacity")  # --megamoe-NAME is the field NAME of Options
TYPE_OPTION, OUR_OPTION = "--moe-token-dispatcher-type", "--moe-dispatcher"


def patch_parser() -> None:
    """Put our options into every parser of `megatron.training.arguments`, and validate after Megatron has. Once."""
    from megatron.training import arguments

    if hasattr(arguments.add_megatron_arguments, "__megamoe__"):
        return
    original = arguments.add_megatron_arguments

    @functools.wraps(original)
    def add_megatron_arguments(parser):
        return add_arguments(original(parser))

    add_megatron_arguments.__megamoe__ = True
    arguments.add_megatron_arguments = add_megatron_arguments
    arguments.validate_args = _validating(arguments.validate_args)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our options, "megamoe" among the dispatcher types, flat YAML; twice is as once. Returns the parser."""
    if OUR_OPTION in parser._option_string_actions:
        return parser
    their_type = parser._option_string_actions[TYPE_OPTION]
    their_type.choices = [*their_type.choices, NAME]
    default, their_type.default = their_type.default, None  # None: not given, so that a contradiction can be seen
    parser._option_string_actions["--yaml-cfg"].type = _refuse_nested_yaml
    if not torch.cuda.is_available():
        parser.set_defaults(distributed_backend="gloo")  # nccl, the default, cannot work here
    group = parser.add_argument_group(GROUP)
    group.add_argument(
        OUR_OPTION, choices=their_type.choices, help=f"megamoe turns the layer on; short for {TYPE_OPTION}"
    )
    group.add_argument(
        CONFIG_OPTION,
        metavar="FILE.yaml",
        help="flat YAML: each `key: value` is read as `--key value`; the command line wins; an unknown key is an error",
    )
    group.add_argument(
        "--megamoe-backend",
        choices=BACKENDS,
        help="what runs the experts; auto (default): the kernels for CUDA tensors, plain torch for others",
    )
    group.add_argument(
        "--megamoe-recompute", choices=["fc1"], help="h is not kept for backward but computed again (default: kept)"
    )
    group.add_argument(
        "--megamoe-experts",
        choices=EXPERTS,
        help="paired (default): one call on the parameters of Megatron's experts; staged: those experts themselves run "
        "between our dispatch and combine",
    )
    group.add_argument(
        "--megamoe-sizing",
        choices=SIZINGS,
        help="for how many rows a rank allocates; see the workspace's table (default: high_water)",
    )
    group.add_argument(
        "--megamoe-capacity", type=int, metavar="ROWS", help="the rows of --megamoe-sizing fixed, a multiple of 128"
    )
    parser.parse_known_args = functools.partial(_parse, parser, parser.parse_known_args, default)
    return parser


def _parse(parser, original, default_type, args=None, namespace=None):
    """`parse_known_args` with the YAML expanded and the two names of the dispatcher made one."""
    try:
        argv = expand_yaml(sys.argv[1:] if args is None else list(args), parser)
        namespace, rest = original(argv, namespace)
        namespace.moe_token_dispatcher_type = _one_dispatcher(namespace, default_type)
        resolve(namespace)
    except ValueError as error:
        parser.error(str(error))
    return namespace, rest


def _one_dispatcher(namespace: argparse.Namespace, default: str) -> str:
    theirs, ours = namespace.moe_token_dispatcher_type, namespace.moe_dispatcher
    if theirs and ours and theirs != ours:
        raise ValueError(f"{OUR_OPTION} {ours} contradicts {TYPE_OPTION} {theirs}: give one of them")
    return ours or theirs or default


def resolve(args: argparse.Namespace) -> None:
    """Hand the options that TransformerConfig has no field for to the layers that will be built, where given."""
    given = {name: getattr(args, f"megamoe_{name}") for name in GIVEN}
    install(**{name: value for name, value in given.items() if value is not None})


def _refuse_nested_yaml(path: str) -> None:
    raise argparse.ArgumentTypeError(
        f"{path}: Megatron's nested YAML drops the keys it does not know in silence; "
        f"use {CONFIG_OPTION} with flat `key: value` lines"
    )


def _validating(original):
    """`validate_args`, then our own refusals on the configs that these arguments make."""

    @functools.wraps(original)
    def validate_args(args, *more, **kwargs):
        result = original(args, *more, **kwargs)
        if args.num_experts and args.moe_token_dispatcher_type == NAME:
            install(tokens=workspaces.tokens_of(args), deadline_s=60.0 * args.distributed_timeout_minutes)
            # With a spec of the user's own the experts are known when the model is built, which validates again.
            experts = "staged" if args.spec else options().experts
            validate(*_configs(args), experts=experts, backend=options().backend)
        return result

    return validate_args


def _configs(args: argparse.Namespace) -> tuple:
    """TransformerConfig, DDP config and optimizer config of Megatron's arguments."""
    from megatron.training import training
    from megatron.training.arguments import core_transformer_config_from_args

    optimizer, _ = training.get_megatron_optimizer_config(args)
    return core_transformer_config_from_args(args), training.get_megatron_ddp_config(args), optimizer


def expand_yaml(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """`argv` with every `--megamoe-config FILE` replaced by the file's settings, which stand first so that argv wins.

    Raises ValueError: file unreadable, not flat, a key given twice or unknown to `parser`, a value of the wrong kind.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(CONFIG_OPTION, action="append", default=[], dest="files")
    found, rest = finder.parse_known_args(argv)
    return [word for path in found.files for word in _words_of_file(path, parser)] + rest


def _words_of_file(path: str, parser: argparse.ArgumentParser) -> list[str]:
    return [word for key, value in flat_yaml.read(path).items() for word in _words(path, key, value, parser)]


def _words(path: str, key: str, value: object, parser: argparse.ArgumentParser) -> list[str]:
    """`key: value` as command-line words. `true` gives a flag, `false` leaves it out (or takes its `--no-` form)."""
    option = f"--{key}"
    if option not in parser._option_string_actions:
        option = option.replace("_", "-")
    action = parser._option_string_actions.get(option)
    if action is None or option == CONFIG_OPTION:
        raise ValueError(f"{CONFIG_OPTION} {path}: unknown key {key!r}")
    if action.nargs == 0:
        return _flag_words(path, key, option, value, action)
    if isinstance(value, list) and action.nargs is not None:
        return [option, *map(str, value)]
    if isinstance(value, list):
        raise ValueError(f"{CONFIG_OPTION} {path}: {key}: got {value!r}; allowed: one value")
    return [option, str(value)] if action.nargs is not None else [f"{option}={value}"]


def _flag_words(path: str, key: str, option: str, value: object, action: argparse.Action) -> list[str]:
    if not isinstance(value, bool):
        raise ValueError(f"{CONFIG_OPTION} {path}: {key}: got {value!r}; allowed: true or false")
    if value:
        return [option]
    negative = f"--no-{option.removeprefix('--')}"
    return [negative] if negative in action.option_strings else []
