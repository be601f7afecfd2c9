"""Our YAML files: flat lines of `key: value`, a value being a scalar or a list of them. No torch, no Megatron."""

import yaml

OPTION = "--megamoe-config"


def read(path: str) -> dict[str, object]:
    """The settings in `path`. Raises ValueError, of one line: unreadable, not flat, a key twice or without a value."""
    try:
        with open(path) as file:
            settings = yaml.load(file, _UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{OPTION} {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{OPTION} {path}: got {type(settings).__name__}; allowed: lines of `key: value`")
    for key, value in settings.items():
        items = value if isinstance(value, list) else [value]
        if any(item is None or isinstance(item, dict | list) for item in items):
            raise ValueError(f"{OPTION} {path}: {key}: got {value!r}; allowed: one value, or a list of values")
    return {str(key): value for key, value in settings.items()}


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys in silence."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
