"""Which layers to cut: one objective, and the strategies that look for its best."""

from .result import GateStep, ScoredCut, SearchResult
from .segment_search import search_segments

__all__ = ["GateStep", "ScoredCut", "SearchResult", "search_segments"]
