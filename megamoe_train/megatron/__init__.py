"""The layer inside Megatron. Whatever is imported from here, a Megatron that cannot work is refused first."""

from megamoe_train.versions import check_versions

check_versions(("python", "torch", "megatron-core"))
