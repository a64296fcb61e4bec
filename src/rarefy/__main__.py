"""python -m rarefy"""

from rarefy.cli import main

if __name__ == "__main__":
    main()
