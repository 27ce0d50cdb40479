"""GET /: the chat page, one file without a build step, and the policy that keeps it to itself.

The page's style and script are allowed by their digests, and requests to this server only; nothing else is loaded.
"""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Response

router = APIRouter()
PAGE = Path(__file__).with_name("index.html").read_text(encoding="utf-8")


def _digest(tag: str) -> str:
    """Return the source expression of the page's one element of this kind."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_digest('script')}",
            f"style-src {_digest('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """Answer with the chat page."""
    return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)
