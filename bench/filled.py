"""The command line where something else fills the disk once the run has begun: nothing is refused beforehand."""

from llm_streamline.cli import main
from llm_streamline.estimate import Estimate

if __name__ == "__main__":
    Estimate.problem = lambda *_: None  # type: ignore[method-assign]
    main()
