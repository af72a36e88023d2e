"""Which layers to cut: one objective, and the strategies that look for its best."""

from .result import GateStep, ScoredCut, SearchResult, TriedLength
from .segment_search import search_segments, search_within_budget

__all__ = ["GateStep", "ScoredCut", "SearchResult", "TriedLength", "search_segments", "search_within_budget"]
