"""The command line, with nothing refused for memory: torch alone takes more than the tests' models."""

from llm_streamline.cli import main
from llm_streamline.estimate import Estimate

if __name__ == "__main__":
    Estimate.problem = lambda *_: None
    main()
