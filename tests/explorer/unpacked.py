"""Reader of the explorer's data files, independent of their writer."""

import base64
import gzip
import json
import re


def unpacked(site, name):
    """Content of a packed data file; checks its form, which the pages rely on."""
    text = (site / "data" / f"{name}.js").read_text("ascii")
    match = re.fullmatch(r'MFN\.receive\("([^"]+)","([A-Za-z0-9+/=]+)"\);\n', text)
    assert match[1] == name
    return json.loads(gzip.decompress(base64.b64decode(match[2], validate=True)))


def plain(site):
    """Content of `site.js`."""
    text = (site / "data" / "site.js").read_text("ascii")
    return json.loads(re.fullmatch(r'MFN\.receive\("site",(.*)\);\n', text)[1])
