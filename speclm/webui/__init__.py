"""A chat page in the browser: its conversation, its texts, and the page itself."""

from speclm.webui.session import Methods, Session
from speclm.webui.turns import Comparison, Progress, Settings, Turn

__all__ = ["Comparison", "Methods", "Progress", "Session", "Settings", "Turn"]
