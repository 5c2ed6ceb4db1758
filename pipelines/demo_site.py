"""The demo's web: sample photos from installed packages, with planted troubles, on loopback."""

from curation.config import Settings


class DemoSite(Settings):
    """Serve sample photos on loopback while the recipe runs."""

    port: int = 18700
    """Port on 127.0.0.1; it is part of the URLs, and so of the ids."""
