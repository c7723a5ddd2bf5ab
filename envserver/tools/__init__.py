"""Tools that any suite can offer, with their schemas.

tool.py        what a tool is; Toolbox, the tools of one episode
calculator.py  arithmetic, parsed and never evaluated as code
python.py      Python in the sandbox, with state kept through the episode
read_file.py   text of files of many kinds, parsed in the sandbox
search.py      search and page reading, over any SearchProvider
corpus.py      the provider for local documents: SQLite's full-text search
browser.py     headless Chromium for the pages of a folder: open, read, click, type, back
"""

from envserver.tools.browser import Browser
from envserver.tools.calculator import Calculator
from envserver.tools.corpus import Corpus, Document
from envserver.tools.python import PythonTool
from envserver.tools.read_file import ReadFile
from envserver.tools.search import Hit, OpenPage, Search, SearchProvider
from envserver.tools.tool import Observation, Tool, Toolbox, describe

__all__ = [
    "Browser",
    "Calculator",
    "Corpus",
    "Document",
    "Hit",
    "Observation",
    "OpenPage",
    "PythonTool",
    "ReadFile",
    "Search",
    "SearchProvider",
    "Tool",
    "Toolbox",
    "describe",
]
