"""API keys, and settings that are refused."""

from __future__ import annotations

import time

import pytest

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.serve import keys
from notellm2_ray.serve.keys import KeyRing, create_key, read_keys, revoke_key


def test_a_key_is_random_and_kept_as_a_hash_only(tmp_path):
    path = tmp_path / "deep" / "keys.json"
    first, second = create_key(path, "ann", ["read"]), create_key(path, "bob", ["read", "write", "read"])
    assert first != second and len(first) >= 43
    text = path.read_text()
    assert first not in text and keys.digest(first) in text
    assert path.stat().st_mode & 0o777 == 0o600
    ring = KeyRing(path)
    assert ring.verify(second).scopes == ("read", "write") and ring.verify(first).name == "ann"
    assert ring.verify("") is None and ring.verify(first[:-1]) is None and ring.verify("\ud800") is None


def test_a_running_service_refuses_a_revoked_key(tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    key = create_key(path, "ann", ["read"])
    monkeypatch.setattr(keys, "_RELOAD_SECONDS", 0.01)
    ring = KeyRing(path)
    assert ring.verify(key)
    revoke_key(path, "ann")
    time.sleep(0.02)
    assert ring.verify(key) is None and read_keys(path) == []


def test_wrong_names_scopes_and_files_are_refused(tmp_path):
    path = tmp_path / "keys.json"
    create_key(path, "ann", ["read"])
    for name, scopes in (("ann", ["read"]), ("a b", ["read"]), ("x", []), ("x", ["admin"])):
        with pytest.raises(ConfigError):
            create_key(path, name, scopes)
    with pytest.raises(ConfigError, match="no key"):
        revoke_key(path, "bob")
    path.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_keys(path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_beyond_loopback_keys_cannot_be_switched_off(host):
    assert build(ServeSettings, {"host": host}).needs_key
    with pytest.raises(ConfigError, match="keys create"):
        build(ServeSettings, {"host": host, "auth": "off"})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_on_loopback_no_key_is_needed_unless_asked_for(host):
    assert not build(ServeSettings, {"host": host}).needs_key
    assert build(ServeSettings, {"host": host, "auth": "on"}).needs_key


def test_contradicting_settings_are_refused():
    with pytest.raises(ConfigError, match="add up"):
        build(ServeSettings, {"arms": [{"name": "a", "share": 0.5}]})
    with pytest.raises(ConfigError, match="the same name"):
        build(ServeSettings, {"arms": [{"name": "a", "share": 0.5}] * 2})
    with pytest.raises(ConfigError, match="below replicas"):
        build(ServeSettings, {"gateway": {"replicas": 3, "max_replicas": 2}})
    with pytest.raises(ConfigError, match="did you mean"):
        build(ServeSettings, {"limits": {"body_byte": 3000}})
