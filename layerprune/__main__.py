from layerprune.cli import main

main()
