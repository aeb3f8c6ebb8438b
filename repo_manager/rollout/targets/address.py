"""An address in a cluster: `SCHEME://namespace/name`, and `?context=NAME` of the kubeconfig."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, TypeVar

from repo_manager.errors import UsageError

__all__ = ["ClusterAddress", "form_of"]

A = TypeVar("A", bound="ClusterAddress")


def form_of(scheme: str, namespace: str, name: str) -> re.Pattern[str]:
    """Return the form of an address.

    Args:
        scheme: scheme of the address, without `://`.
        namespace: the form of a namespace, a regular expression.
        name: the form of a name, a regular expression.
    """
    context = r"(?:\?context=(?P<context>[^?#&\s]+))?"
    return re.compile(rf"{scheme}://(?P<namespace>{namespace})/(?P<name>{name})/?{context}")


@dataclasses.dataclass(frozen=True)
class ClusterAddress:
    """Something in the cluster the kubeconfig names.

    Attributes:
        SCHEME: the scheme of such addresses without `://`, for instance `k8s`.
        FORM: of the whole text, by `form_of`.
        IS_NOT: end of the message for another text: the kind it is not, and the right form.
        namespace: Kubernetes namespace of the object.
        name: name of the object in that namespace.
        context: of the kubeconfig. `None`: its current one.
    """

    SCHEME: ClassVar[str]
    FORM: ClassVar[re.Pattern[str]]
    IS_NOT: ClassVar[tuple[str, str]]
    namespace: str
    name: str
    context: str | None = None

    @classmethod
    def parse(cls: type[A], text: str) -> A:
        """Read an address.

        Raises:
            UsageError: the text is no such address.
        """
        match = cls.FORM.fullmatch(text)
        if match is None:
            what, hint = cls.IS_NOT
            raise UsageError(f"{text!r} is no {what}", hint=hint)
        return cls(match["namespace"], match["name"], match["context"])

    def __str__(self) -> str:
        context = "" if self.context is None else f"?context={self.context}"
        return f"{self.SCHEME}://{self.namespace}/{self.name}{context}"
