from shim.cli.main import main

if __name__ == "__main__":  # job processes of the daemon import this module again
    raise SystemExit(main())
