"""python -m rarefy"""

from rarefy.cli.main import main

if __name__ == "__main__":
    main()
