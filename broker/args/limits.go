package args

// Limits of a step's arguments. A request beyond one of them is malformed.
const (
	MaxCount    = 64       // arguments
	MaxName     = 64       // bytes of a name
	MaxString   = 8 << 10  // bytes of a string, and of an element of a list
	MaxElements = 256      // elements of a list
	MaxBytes    = 64 << 10 // bytes of the whole object in its canonical form
)

// Limits of a constraint. The limits of arguments also apply to the values in it.
const (
	MaxConstraint      = 16 << 10 // bytes of the canonical wire form
	MaxConstraintSet   = 256      // members of one_of, not_one_of and subset; choices for a word
	MaxConstraintWords = 32       // words of a command; patterns for further words
	MaxConstraintLine  = 2 << 10  // bytes of a command line
	MaxConstraintText  = 256      // bytes of a glob, a subpath, a host, a path or a word
	MaxConstraintParts = 8        // parts of all
)
