"""Which addresses a public crawl may connect to."""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = ipaddress.ip_address("168.63.129.16")
"""Azure's wire server: a metadata service on an address that looks public."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(text: str) -> bool:
    """Whether an address lies on the public internet.

    Private, loopback, link-local (cloud metadata), shared, multicast and reserved addresses do
    not, nor do IPv6 addresses that carry such an IPv4 address.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    inner = _embedded(address)
    if inner is not None and not is_public(str(inner)):
        return False
    if inner is not None and address in _NAT64:
        return True
    return address.is_global and not address.is_multicast and address != _METADATA


def _embedded(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to: mapped, NAT64, 6to4 or Teredo."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64 or int(address) >> 32 == 0:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        return address.sixtofour
    return address.teredo[1] if address.teredo is not None else None
