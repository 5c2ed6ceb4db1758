"""Which addresses a public crawl may connect to."""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = (
    ipaddress.ip_network("168.63.129.16/32"),  # Azure's wire server, on a public address
    ipaddress.ip_network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata lies there
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is assigned to the public internet."""


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
    if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST and inner is None:
        return False
    listed = any(address in network for network in _METADATA)
    return address.is_global and not address.is_multicast and not listed


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
