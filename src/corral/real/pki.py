"""The cluster's certificate authority and the nodes' certificates: who may speak to whom (DESIGN 4, Identity).

One directory holds `ca.crt`, `ca.key`, `node-N.crt`, `node-N.key`. A node needs ca.crt and its own pair; ca.key stays
where certificates are made. What a node's certificate says is in `identity`.
Keys are EC P-256 in files of mode 0600; TLS is 1.3 or nothing, both sides must show a certificate of the CA.
"""

import datetime
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from corral.base.errors import ConfigurationError
from corral.base.ids import NAME_MAX, NODE_MAX, NodeId
from corral.real.identity import Credentials, names_of, node_uri

CA_YEARS: Final = 20
NODE_YEARS: Final = 10
BACKDATE: Final = datetime.timedelta(
    days=2
)  # a node whose clock is a little behind must not refuse a fresh certificate

T = TypeVar("T")


# --- making ----------------------------------------------------------------------------------------------------------


def create_authority(directory: str | Path, cluster: str) -> None:
    """Writes ca.crt and ca.key. Raises ConfigurationError when one of them is there already."""
    check_cluster_name(cluster)
    home = Path(directory)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("ca.key", "ca.crt"):
        if (home / name).exists():
            raise ConfigurationError(
                f"{home / name} exists already: this directory has a certificate authority; use it, or remove both "
                "ca.crt and ca.key (every node then needs a new certificate)"
            )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(cluster, "corral cluster CA")
    builder = (
        _builder(subject, subject, key.public_key(), CA_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    _write(home / "ca.key", _key_bytes(key), 0o600)
    _write(home / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def create_node(directory: str | Path, node: NodeId, *, replace: bool = False) -> None:
    """Writes node-N.crt and node-N.key, signed by the directory's CA for the CA's cluster."""
    home = Path(directory)
    if not 1 <= node <= NODE_MAX:
        raise ConfigurationError(f"node id {node} is not between 1 and {NODE_MAX}")
    authority = _load_certificate(home / "ca.crt", "the certificate of the cluster's CA")
    ca_key = _load_key(home / "ca.key", "the key of the cluster's CA")
    if ca_key.public_key() != authority.public_key():
        raise ConfigurationError(
            f"{home / 'ca.key'} is not the key of {home / 'ca.crt'}: restore the pair from a backup"
        )
    if not replace:
        for path in (home / f"node-{node}.key", home / f"node-{node}.crt"):
            if path.exists():
                raise ConfigurationError(f"{path} exists already: use it, or remove it to make a new one")
    cluster = _cluster_of(authority, home / "ca.crt")
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _builder(_subject(cluster, f"node {node}"), authority.subject, key.public_key(), NODE_YEARS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(node_uri(cluster, node))]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
    )
    certificate = builder.sign(ca_key, hashes.SHA256())
    _write(home / f"node-{node}.key", _key_bytes(key), 0o600)
    _write(home / f"node-{node}.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def check_cluster_name(cluster: str) -> None:
    if not cluster or len(cluster.encode()) > NAME_MAX or not cluster.isprintable():
        raise ConfigurationError(f"cluster name {cluster!r} must be 1 to {NAME_MAX} bytes of printable text")


def _subject(cluster: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, years: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=365 * years))
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Never readable by others, not even for a moment; never half there."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)


# --- loading ---------------------------------------------------------------------------------------------------------


def load(directory: str | Path, node: NodeId) -> Credentials:
    """Reads and checks ca.crt, node-N.crt and node-N.key. Raises ConfigurationError: which file, what, what to do."""
    home = Path(directory)
    ca_path, certificate_path, key_path = home / "ca.crt", home / f"node-{node}.crt", home / f"node-{node}.key"
    authority = _load_certificate(ca_path, "the certificate of the cluster's CA")
    certificate = _load_certificate(certificate_path, f"the certificate of node {node}")
    key = _load_key(key_path, f"the key of node {node}")
    again = f"make a new one with the CA of this cluster (remove {certificate_path.name} and {key_path.name} first)"
    if key.public_key() != certificate.public_key():
        raise ConfigurationError(f"{key_path} is not the key of {certificate_path}: {again}")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigurationError(f"{certificate_path} was not signed by {ca_path}: {again}") from None
    now = datetime.datetime.now(datetime.UTC)
    for path, shown in ((ca_path, authority), (certificate_path, certificate)):
        if not shown.not_valid_before_utc <= now <= shown.not_valid_after_utc:
            raise ConfigurationError(
                f"{path} is valid from {shown.not_valid_before_utc:%Y-%m-%d} to {shown.not_valid_after_utc:%Y-%m-%d} "
                f"and the clock says {now:%Y-%m-%d}: set the clock, or make a new certificate"
            )
    cluster = _cluster_of(authority, ca_path)
    named = _node_names(certificate)
    if named != (cluster, node):
        raise ConfigurationError(f"{certificate_path} does not name node {node} of cluster {cluster!r}: {again}")
    return Credentials(
        cluster,
        node,
        _context(ssl.PROTOCOL_TLS_SERVER, ca_path, certificate_path, key_path),
        _context(ssl.PROTOCOL_TLS_CLIENT, ca_path, certificate_path, key_path),
    )


def _context(side: int, ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the names we check are cluster and node, after the handshake
    context.verify_mode = ssl.CERT_REQUIRED
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every connection shows its certificate: no resumption
    try:
        context.load_verify_locations(ca)
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(f"{certificate} cannot be used for TLS: {error}; make a new certificate") from None
    return context


def _load_certificate(path: Path, what: str) -> x509.Certificate:
    return _parse(path, what, x509.load_pem_x509_certificate)


def _load_key(path: Path, what: str) -> ec.EllipticCurvePrivateKey:
    def parse(content: bytes) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(content, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an elliptic curve key")
        return key

    key = _parse(path, what, parse)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigurationError(f"{path} is open to others (mode {mode:04o}): run chmod 600 {path}")
    return key


def _parse(path: Path, what: str, parser: Callable[[bytes], T]) -> T:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path} is missing ({what}): copy it here, or make it with the cluster's CA"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{path} ({what}) cannot be read: {error.strerror}; check owner and mode") from None
    try:
        return parser(content)
    except (ValueError, TypeError) as error:
        reason = str(error).split(".")[0].split("\n")[0]
        raise ConfigurationError(f"{path} does not hold {what} ({reason}): restore it from a copy") from None


def _cluster_of(authority: x509.Certificate, path: Path) -> str:
    names = authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise ConfigurationError(f"{path} does not name a cluster in its subject (O=): it is not a corral CA")
    return names[0].value


def _node_names(certificate: x509.Certificate) -> tuple[str, NodeId] | None:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return None
    uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    return names_of({"subjectAltName": [("URI", uri) for uri in uris]})
