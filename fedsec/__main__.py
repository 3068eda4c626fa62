"""`python -m fedsec` is the command line."""

from fedsec.cli import main

if __name__ == "__main__":
    main()
