"""Tested, untested, too old, missing: what is said and what is refused."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from megamoe_train import versions


@pytest.fixture
def installed(monkeypatch):
    """Pretends that the given versions are installed; None = not installed."""

    def pretend(**found: str | None) -> None:
        known = {name.replace("_", "-"): version for name, version in found.items()}
        monkeypatch.setattr(versions, "installed_version", lambda name: known[name])

    return pretend


@pytest.mark.parametrize(
    ("name", "found", "state"),
    [
        ("torch", "2.11.0+cu130", "tested"),
        ("torch", "2.11.1", "tested"),
        ("torch", "2.12.0", "untested"),
        ("torch", "2.10.0", "untested"),
        ("torch", "2.110.0", "untested"),
        ("torch", "3.0.0a0+git123", "untested"),
        ("torch", "2.8.0", "too old"),
        ("torch", "1.13.1", "too old"),
        ("torch", None, "missing"),
        ("python", "3.12.3", "tested"),
        ("python", "3.13.0", "untested"),
        ("python", "3.11.9", "too old"),
        ("megatron-core", "0.19.2", "tested"),
        ("megatron-core", "0.19.0", "untested"),
        ("megatron-core", "0.20.0rc1", "untested"),
        ("megatron-core", "0.18.1", "too old"),
    ],
)
def test_states(installed, name, found, state):
    installed(**{name.replace("-", "_"): found})
    verdict = versions.version_state(name)
    assert (verdict.found, verdict.state) == (found, state)
    for part in (name, found or "not installed", state, versions.TESTED[name], versions.MINIMUM[name]):
        assert part in verdict.describe()


def test_what_is_installed_here_is_what_is_tested():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_versions(tuple(versions.TESTED))


def test_untested_warns_and_the_rest_is_refused(installed):
    installed(python="3.12.3", torch="2.13.0", megatron_core="0.17.0")
    with pytest.warns(UserWarning, match=r"megamoe_train: torch 2.13.0: untested \(tested: 2.11, oldest"):
        versions.check_versions()
    with pytest.raises(RuntimeError, match=r"megamoe_train cannot run: megatron-core 0.17.0: too old"):
        versions.check_versions(("megatron-core",))
    installed(python="3.12.3", torch=None)
    with pytest.raises(RuntimeError, match=r"megamoe_train cannot run: torch not installed: missing"):
        versions.check_versions()


def test_the_face_checks_versions_before_it_loads(installed, monkeypatch):
    import megamoe_train

    installed(python="3.12.3", torch="2.8.0")
    monkeypatch.delitem(vars(megamoe_train), "moe", raising=False)
    with pytest.raises(RuntimeError, match=r"torch 2.8.0: too old"):
        _ = megamoe_train.moe


def test_megatron_that_is_too_old_is_refused_before_it_is_imported():
    code = (
        "import sys\nfrom megamoe_train import versions\n"
        "real = versions.installed_version\n"
        "versions.installed_version = lambda name: '0.18.0' if name == 'megatron-core' else real(name)\n"
        "try:\n    import megamoe_train\n    megamoe_train.install()\n"
        "except RuntimeError as error:\n    print(error, 'megatron.core' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert answer.stdout.startswith("megamoe_train cannot run: megatron-core 0.18.0: too old (tested: 0.19.2")
    assert answer.stdout.endswith(" False\n")


def test_nothing_older_than_the_minimum_is_called_tested():
    assert versions.TESTED.keys() == versions.MINIMUM.keys()
    for name, tested in versions.TESTED.items():
        assert versions._numbers(tested) >= versions._numbers(versions.MINIMUM[name])


def test_not_installed_is_none():
    assert versions.installed_version("no-such-distribution-of-anyone") is None
