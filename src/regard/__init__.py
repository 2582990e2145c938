"""Published attention systems as working software: one import, one command line, one standard of evidence.

>>> import regard
>>> regard.papers.get("based").title
'Simple linear attention language models balance the recall-throughput tradeoff'
"""

from importlib.metadata import version

from regard import papers

__all__ = ["__version__", "papers"]
__version__ = version("regard")
