"""A chat page in the browser: its conversation, its texts, and the page itself."""

from speclm.webui.session import Comparison, Methods, Progress, Session, Settings, Turn

__all__ = ["Comparison", "Methods", "Progress", "Session", "Settings", "Turn"]
