package main

import (
	"go/ast"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// stringsReader reads the texts among the strings of Go files. A string is counted once, for the outermost use of it.
type stringsReader struct {
	set      *token.FileSet
	declared declared
	seen     map[token.Pos]bool
	found    []passage

	at goFile // the file that is read
}

func (r *stringsReader) read(f goFile) {
	r.at = f
	ast.Inspect(f.syntax, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			r.call(n)
		case *ast.CompositeLit:
			r.literal(n)
		case *ast.AssignStmt:
			r.assignment(n)
		}
		return true
	})
}

var flagCall = regexp.MustCompile(`^(Bool|Count|Duration|Float|Int|String|Uint)[A-Za-z0-9]*$`)

// call reads the arguments of functions that make errors, take hints or declare flags.
func (r *stringsReader) call(c *ast.CallExpr) {
	name, of, isMethod := r.callee(c.Fun)
	switch {
	case of == "errors" && name == "New", of == "fmt" && name == "Errorf":
		r.texts(failures, c.Args...)
		return
	case of != "" && flagCall.MatchString(name) && len(c.Args) >= 3:
		if last := len(c.Args) - 1; slices.ContainsFunc(c.Args[:last], isLiteral) { // the flag's name
			r.texts(help, c.Args[last])
		}
		return
	}
	t, ok := lookUp(r.declared.functions, path.Dir(r.at.path), name)
	if !ok || t.method != isMethod {
		return
	}
	if t.hint >= 0 && t.hint < len(c.Args) {
		r.texts(hints, c.Args[t.hint])
	}
	if t.failure >= 0 && t.failure < len(c.Args) {
		end := t.failure + 1
		if t.format {
			end = len(c.Args)
		}
		r.texts(failures, c.Args[t.failure:end]...)
	}
}

// callee returns the name of a called function or method, and the package or the value that it is called of.
func (r *stringsReader) callee(fun ast.Expr) (name, of string, isMethod bool) {
	switch fun := fun.(type) {
	case *ast.Ident:
		return fun.Name, "", false
	case *ast.SelectorExpr:
		if x, ok := fun.X.(*ast.Ident); ok {
			return fun.Sel.Name, x.Name, !r.at.imports[x.Name]
		}
		return fun.Sel.Name, "value", true
	}
	return "", "", false
}

func isLiteral(e ast.Expr) bool {
	l, ok := e.(*ast.BasicLit)
	return ok && l.Kind == token.STRING
}

var commandTexts = []string{"Use", "Short", "Long", "Example"}

// literal reads the fields of commands, and every field that holds a hint.
func (r *stringsReader) literal(l *ast.CompositeLit) {
	r.elements(l)
	at := -1
	switch t := l.Type.(type) {
	case *ast.Ident:
		at = r.hintField(t.Name)
	case *ast.SelectorExpr:
		at = r.hintField(t.Sel.Name)
	case *ast.ArrayType:
		// The elements of a list may leave their type out.
		if s, ok := t.Elt.(*ast.StructType); ok {
			at = hintField(s)
		} else if name, ok := t.Elt.(*ast.Ident); ok {
			at = r.hintField(name.Name)
		}
		for _, e := range l.Elts {
			if e, ok := e.(*ast.CompositeLit); ok && e.Type == nil {
				r.positional(e, at)
				r.elements(e)
			}
		}
		return
	}
	r.positional(l, at)
}

func (r *stringsReader) hintField(name string) int {
	if at, ok := lookUp(r.declared.structs, path.Dir(r.at.path), name); ok {
		return at
	}
	return -1
}

func (r *stringsReader) positional(l *ast.CompositeLit, at int) {
	if at < 0 || at >= len(l.Elts) {
		return
	}
	if _, keyed := l.Elts[at].(*ast.KeyValueExpr); !keyed {
		r.texts(hints, l.Elts[at])
	}
}

// elements reads the fields that a literal names.
func (r *stringsReader) elements(l *ast.CompositeLit) {
	for _, e := range l.Elts {
		if e, ok := e.(*ast.KeyValueExpr); ok {
			if key, ok := e.Key.(*ast.Ident); ok {
				r.member(key.Name, e.Value, isNamed(l.Type, "Command"))
			}
		}
	}
}

// assignment reads the texts that are assigned to a member.
func (r *stringsReader) assignment(a *ast.AssignStmt) {
	if len(a.Lhs) != len(a.Rhs) {
		return
	}
	for i, left := range a.Lhs {
		if s, ok := left.(*ast.SelectorExpr); ok {
			r.member(s.Sel.Name, a.Rhs[i], r.at.imports["cobra"])
		}
	}
}

func (r *stringsReader) member(name string, value ast.Expr, ofCommand bool) {
	switch {
	case isHint(name):
		r.texts(hints, value)
	case ofCommand && slices.Contains(commandTexts, name):
		r.texts(help, value)
	}
}

// texts makes passages of the strings in expressions.
func (r *stringsReader) texts(k kind, expressions ...ast.Expr) {
	for _, e := range expressions {
		w := writer{kind: k}
		r.write(&w, e)
		w.end()
		r.found = append(r.found, w.closed...)
	}
}

// write joins strings that are added by +. The arguments of calls are texts of their own. The names among an error's
// arguments are variables that may be called like a constant.
func (r *stringsReader) write(w *writer, e ast.Expr) {
	switch e := e.(type) {
	case *ast.BasicLit:
		r.writeString(w, e)
	case *ast.ParenExpr:
		r.write(w, e.X)
	case *ast.BinaryExpr:
		if e.Op == token.ADD {
			r.write(w, e.X)
			r.write(w, e.Y)
		}
	case *ast.Ident:
		if value, ok := lookUp(r.declared.constants, path.Dir(r.at.path), e.Name); ok && w.kind != failures {
			r.write(w, value)
		} else {
			w.write(0, "…")
		}
	case *ast.CallExpr:
		w.write(0, "…")
		r.texts(w.kind, e.Args...)
	default:
		w.write(0, "…")
	}
}

func (r *stringsReader) writeString(w *writer, l *ast.BasicLit) {
	if l.Kind != token.STRING || r.seen[l.Pos()] {
		return
	}
	r.seen[l.Pos()] = true
	text, err := strconv.Unquote(l.Value)
	if err != nil {
		panic("english: a string that the parser should have refused: " + l.Value)
	}
	at := r.set.Position(l.Pos())
	w.file = at.Filename
	for i, line := range strings.Split(text, "\n") {
		if i > 0 {
			w.endLine()
			if l.Value[0] == '`' {
				at.Line++
			}
			line = strings.TrimLeft(line, " \t")
		}
		w.write(at.Line, line)
	}
}
