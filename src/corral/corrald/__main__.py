from corral.corrald.main import main

main()
