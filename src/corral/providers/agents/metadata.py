"""What a FenceAgentAPI program says of itself: parameters and actions, from its XML (`action=metadata`).

The program is foreign, so its XML is hostile: bounded in size, depth and number of elements; a document type or entity
declaration is refused outright (no expansion, nothing external). Source: ClusterLabs fence-agents
`doc/FenceAgentAPI.md` and the metadata of its agents.
"""

import difflib
from collections.abc import Mapping
from typing import Final, NamedTuple
from xml.parsers import expat

from corral.base.errors import ConfigurationError

SIZE_MAX: Final = 256 << 10
DEPTH_MAX: Final = 8
ELEMENTS_MAX: Final = 8192
TEXT_MAX: Final = 400  # characters of a document that appear in one sentence of ours

BOOLEANS: Final = frozenset(("0", "1", "yes", "no", "true", "false", "on", "off"))
NAMING_VICTIM: Final = ("plug", "port")  # filled in from the node's name when nobody sets them


class Parameter(NamedTuple):
    name: str
    required: bool
    type: str  # string, boolean, integer, second, select
    default: str | None
    options: tuple[str, ...]
    obsoletes: str  # the older name of the same thing
    description: str


class Metadata(NamedTuple):
    name: str
    parameters: dict[str, Parameter]
    actions: frozenset[str]

    @property
    def names_victim_by(self) -> str:
        """The parameter that tells this agent which of its plugs is meant; "" when a device is one node's only."""
        return next((name for name in NAMING_VICTIM if name in self.parameters), "")

    def check(self, given: Mapping[str, str], *, action: str, where: str) -> None:
        """Raises ConfigurationError naming the parameter and what would be right."""
        if "off" not in self.actions:
            raise ConfigurationError(f"{where}: agent {self.name} has no action off, so it cannot fence")
        if action == "reboot" and "on" not in self.actions:
            raise ConfigurationError(f"{where}: agent {self.name} has no action on: use action 'off' in this method")
        for name in sorted(given):
            if name not in self.parameters:
                close = difflib.get_close_matches(name, self.parameters, 1)
                hint = (
                    f"; did you mean {plain(close[0])}?"
                    if close
                    else f"; it knows {plain(', '.join(sorted(self.parameters)))}"
                )
                raise ConfigurationError(f"{where}: agent {self.name} has no parameter {name}{hint}")
            self._check_value(self.parameters[name], given[name], where)
        for name in sorted(self.parameters):
            self._check_required(name, given, where)

    def _check_value(self, parameter: Parameter, value: str, where: str) -> None:
        kind = parameter.type
        if kind == "integer":
            legal, accepted = value.lstrip("-").isdecimal(), "a whole number"
        elif kind == "second":
            legal, accepted = value.replace(".", "", 1).rstrip("s").isdecimal(), "a number of seconds"
        elif kind == "boolean":
            legal, accepted = value.lower() in BOOLEANS, f"one of {', '.join(sorted(BOOLEANS))}"
        elif kind == "select":
            legal, accepted = value in parameter.options, f"one of {plain(', '.join(parameter.options))}"
        else:
            return
        if not legal:  # the value is not shown: it may be a password in the wrong place
            raise ConfigurationError(f"{where}: parameter {parameter.name} of agent {self.name} must be {accepted}")

    def _check_required(self, name: str, given: Mapping[str, str], where: str) -> None:
        parameter = self.parameters[name]
        if not parameter.required or name == "action" or parameter.default is not None:
            return
        same = self._same_as(name)
        if same.isdisjoint(given) and same.isdisjoint(NAMING_VICTIM):
            newest = next((other for other in sorted(same) if self.parameters[other].obsoletes), name)
            raise ConfigurationError(f"{where}: agent {self.name} needs parameter {plain(newest)}")

    def _same_as(self, name: str) -> set[str]:
        """All names of one parameter, old and new."""
        same = {name}
        same.update(other.name for other in self.parameters.values() if other.obsoletes == name)
        if self.parameters[name].obsoletes in self.parameters:
            same.add(self.parameters[name].obsoletes)
        return same


def parse_metadata(document: bytes, agent: str) -> Metadata:
    """Raises ConfigurationError with what is wrong with it."""
    if len(document) > SIZE_MAX:
        raise ConfigurationError(f"agent {agent}: its metadata is longer than {SIZE_MAX >> 10} KiB")
    reader = _Reader()
    try:
        reader.parser.Parse(document, True)
    except _Refused as refused:
        raise ConfigurationError(f"agent {agent}: its metadata {refused}") from None
    except (expat.ExpatError, ValueError) as error:
        raise ConfigurationError(f"agent {agent}: its metadata is no XML: {error}") from None
    if reader.root != "resource-agent":
        raise ConfigurationError(
            f"agent {agent}: its metadata begins with <{plain(reader.root)}>, not <resource-agent>"
        )
    if not reader.actions:
        raise ConfigurationError(f"agent {agent}: its metadata lists no actions")
    return Metadata(plain(reader.name) or agent, reader.parameters, frozenset(reader.actions))


def plain(text: str) -> str:
    """A foreign program's words, fit for one line of ours."""
    return "".join(character if character.isprintable() else "?" for character in text[:TEXT_MAX])


class _Refused(Exception):
    """Why a document is not read on."""


class _Reader:
    """Collects parameters and actions from the parser's callbacks."""

    def __init__(self) -> None:
        self.root = ""
        self.name = ""
        self.parameters: dict[str, Parameter] = {}
        self.actions: set[str] = set()
        self._path: list[str] = []
        self._elements = 0
        self._current: Parameter | None = None
        self._options: list[str] = []
        self._text: list[str] = []
        self.parser = expat.ParserCreate("utf-8")  # whatever it declares: no other codec is looked up
        self.parser.StartDoctypeDeclHandler = self._refuse_doctype
        self.parser.EntityDeclHandler = self._refuse_doctype
        self.parser.StartElementHandler = self._begin
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters

    def _refuse_doctype(self, *_declaration: object) -> None:
        raise _Refused("declares a document type or entities, which agents never need")

    def _begin(self, tag: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        self._path.append(tag)
        if len(self._path) > DEPTH_MAX or self._elements > ELEMENTS_MAX:
            raise _Refused("is nested too deep or has too many elements")
        self._text = []
        if len(self._path) == 1:
            self.root, self.name = tag, attributes.get("name", "")
        elif self._path[1:] == ["actions", "action"]:
            self.actions.add(attributes.get("name", ""))
        elif self._path[1:3] == ["parameters", "parameter"]:
            self._parameter(tag, attributes)

    def _parameter(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "parameter":
            required = attributes.get("required", "0") in ("1", "true")
            obsoletes = attributes.get("obsoletes", "")
            self._current = Parameter(attributes.get("name", ""), required, "string", None, (), obsoletes, "")
            self._options = []
        elif tag == "content" and self._current is not None:
            kind = attributes.get("type", "string")
            self._current = self._current._replace(type=kind, default=attributes.get("default"))
        elif tag == "option":
            self._options.append(attributes.get("value", ""))

    def _end(self, tag: str) -> None:
        self._path.pop()
        if self._current is None:
            return
        if tag == "shortdesc":
            self._current = self._current._replace(description="".join(self._text).strip())
        elif tag == "parameter":
            if self._current.name:
                self.parameters[self._current.name] = self._current._replace(options=tuple(self._options))
            self._current = None

    def _characters(self, text: str) -> None:
        self._text.append(text)
