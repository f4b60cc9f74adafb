"""`python -m xlstm_distill JOB_DIR` runs one stage; `python -m xlstm_distill report|generate …` the torch commands."""

import sys

from xlstm_distill.stages import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
