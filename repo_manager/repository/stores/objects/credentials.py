"""Credentials, region and account from the environment, by the rules of Triton's own file systems.

    s3://   AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_DEFAULT_REGION (or AWS_REGION), AWS_PROFILE
            with ~/.aws/credentials and ~/.aws/config; else the role of the machine or the pod
    gs://   GOOGLE_APPLICATION_CREDENTIALS; else the machine's account
    as://   AZURE_STORAGE_KEY (the account is in the URL; AZURE_STORAGE_ACCOUNT overrides it)

TRITON_CLOUD_CREDENTIAL_PATH names a file with credentials for each prefix, and wins. Nothing of them is ever printed.
"""

from __future__ import annotations

import configparser
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from repo_manager.errors import RepositoryError
from repo_manager.repository.location import ObjectRepository

__all__ = ["NOWHERE", "S3Keys", "own_endpoint", "s3_keys", "store_config", "without_redirects"]

_TRITON_FILE = "TRITON_CLOUD_CREDENTIAL_PATH"
_ACCOUNT = ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME")
_KEY = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY")
NOWHERE = "127.0.0.1:0"
"""An address nobody can listen on: no connection to port 0 is ever taken."""
_OTHER_ENDPOINT = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": (),
    "as": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
# Hosts that provide a role's credentials to the library.
_ROLE_HOSTS = (
    *("amazonaws.com", "amazonaws.com.cn", "169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::23"),
    *("microsoftonline.com", "microsoftonline.us", "chinacloudapi.cn"),
)
_ROLE_URLS = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_ENDPOINT_URL_STS", "IDENTITY_ENDPOINT", "MSI_ENDPOINT")


@dataclasses.dataclass(frozen=True)
class S3Keys:
    """Keys to sign requests to S3. They stay out of every text.

    Attributes:
        access: the access key's id, as in `aws_access_key_id`.
        secret: the secret key, as in `aws_secret_access_key`.
        token: of a session. Empty when there is none.
        region: the region to sign for, such as `eu-central-1`.
    """

    access: str = dataclasses.field(repr=False)
    secret: str = dataclasses.field(repr=False)
    token: str = dataclasses.field(repr=False)
    region: str


def store_config(location: ObjectRepository, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the storage library's settings beyond the bucket.

    Settings missing in the environment are left to the library. It asks the machine's or the pod's own role.

    Raises:
        RepositoryError: a file the environment names cannot be read.
    """
    if location.scheme == "s3":
        return _s3_config(location, environment)
    entry = _triton_entry(location, environment)
    if location.scheme == "gs":
        path = entry if isinstance(entry, str) else environment.get("GOOGLE_APPLICATION_CREDENTIALS", "")
        return {"google_application_credentials": path} if path else {}
    fields = entry if isinstance(entry, dict) else {}
    account = fields.get("account_str") or _first(environment, _ACCOUNT) or location.endpoint
    key = fields.get("account_key") or _first(environment, _KEY)
    config = {"azure_storage_account_name": account}
    if key:
        config["azure_storage_account_key"] = key
    return config


def own_endpoint(location: ObjectRepository, environment: Mapping[str, str]) -> str:
    """Return the address of a store other than the vendor's own, `http://host:port`. Empty for the vendor's."""
    named = location.endpoint if location.scheme == "s3" else ""
    return named or _first(environment, _OTHER_ENDPOINT[location.scheme])


def without_redirects(endpoint: str, config: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return options to connect the library's client to this endpoint alone.

    The library follows redirects with all headers but `Authorization`, a session's token among them, and with the
    address of the request, perhaps a signed one, as `Referer`. Requests to other hosts are sent to a nonexistent
    proxy.

    Args:
        endpoint: of the store. Empty for the vendor's own, whose TLS certificate says who it is.
        config: result of `store_config`: without keys in it the library also asks for a role's.
        environment: it may name where a role is asked for.

    Returns:
        The options. Empty where a proxy of the environment is on the way: then the proxy decides on the way.
    """
    host = urlsplit(endpoint).hostname
    proxies = getproxies_environment()
    keys = "access_key_id" in config or "azure_storage_account_key" in config
    if not host or (set(proxies) - {"no"} and not (keys and proxy_bypass(host, proxies))):
        return {}
    hosts = [host]
    if not keys:
        asked = (urlsplit(environment.get(name, "")).hostname for name in _ROLE_URLS)
        hosts += [*_ROLE_HOSTS, *filter(None, asked)]
    return {"proxy_url": f"http://{NOWHERE}", "proxy_excludes": ",".join(hosts)}


def s3_keys(location: ObjectRepository, environment: Mapping[str, str]) -> S3Keys | None:
    """Return static keys for S3, or `None` when only the machine's role can give some.

    Raises:
        RepositoryError: a file the environment names cannot be read.
    """
    entry = _triton_entry(location, environment)
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    profile = fields.get("profile") or environment.get("AWS_PROFILE", "")
    access = fields.get("key_id") or environment.get("AWS_ACCESS_KEY_ID", "")
    secret = fields.get("secret_key") or environment.get("AWS_SECRET_ACCESS_KEY", "")
    token = fields.get("session_token") or environment.get("AWS_SESSION_TOKEN", "")
    region = fields.get("region") or environment.get("AWS_DEFAULT_REGION") or environment.get("AWS_REGION") or ""
    if not (access and secret):
        found = _profile(profile or "default", environment, required=bool(profile))
        access, secret = found.get("aws_access_key_id", ""), found.get("aws_secret_access_key", "")
        token = found.get("aws_session_token", "")
        region = region or found.get("region", "")
    if not (access and secret):
        return None
    return S3Keys(access, secret, token, region or "us-east-1")


def _s3_config(location: ObjectRepository, environment: Mapping[str, str]) -> dict[str, str]:
    config: dict[str, str] = {}
    keys = s3_keys(location, environment)
    if keys is not None:
        config = {"access_key_id": keys.access, "secret_access_key": keys.secret, "region": keys.region}
        if keys.token:
            config["session_token"] = keys.token
    elif region := environment.get("AWS_DEFAULT_REGION") or environment.get("AWS_REGION"):
        config["region"] = region
    if location.endpoint:
        config["endpoint"] = location.endpoint
    return config


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def _triton_entry(location: ObjectRepository, environment: Mapping[str, str]) -> object:
    """Return the entry of Triton's credential file for the longest prefix of this place, or `None` without one."""
    path = environment.get(_TRITON_FILE)
    if not path:
        return None
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = document.get(location.scheme, {})
        place = f"{location}/"
        fitting = [prefix for prefix in entries if not prefix or place.startswith(prefix.rstrip("/") + "/")]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as exc:
        # The message never contains the file's content, because it holds keys.
        raise RepositoryError(
            f"the file that {_TRITON_FILE} names cannot be read: {type(exc).__name__}",
            hint="Triton's documentation describes it: docs/user_guide/model_repository, cloud storage credentials.",
        ) from None
    found: object = entries[max(fitting, key=len)] if fitting else None
    return found


def _profile(name: str, environment: Mapping[str, str], *, required: bool) -> dict[str, str]:
    """Read a profile of the AWS command line's files."""
    home = Path(environment.get("HOME") or "~").expanduser() / ".aws"
    files = {
        Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials"): name,
        Path(environment.get("AWS_CONFIG_FILE") or home / "config"): name if name == "default" else f"profile {name}",
    }
    found: dict[str, str] = {}
    for file, section in files.items():
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
            if parser.has_section(section):
                found = {**dict(parser.items(section)), **found}
        except (configparser.Error, OSError, UnicodeDecodeError):
            raise RepositoryError(f"{file} cannot be read as a file of AWS profiles") from None
    if required and not found:
        raise RepositoryError(f"AWS_PROFILE is {name!r}, and there is no such profile in {', '.join(map(str, files))}")
    return found
