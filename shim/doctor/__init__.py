"""What is wrong with this node, and the mend: checks that each try one thing and say what they found."""
