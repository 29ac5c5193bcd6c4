package main

import (
	"go/ast"
	"go/token"
	"path"
	"slices"
	"strings"
)

// goFile is a parsed file and the names under which it imports packages.
type goFile struct {
	path    string // slashes
	syntax  *ast.File
	imports map[string]bool
}

func newGoFile(file string, syntax *ast.File) goFile {
	imports := map[string]bool{}
	for _, i := range syntax.Imports {
		name := path.Base(strings.Trim(i.Path.Value, `"`))
		if i.Name != nil {
			name = i.Name.Name
		}
		imports[name] = true
	}
	return goFile{file, syntax, imports}
}

// declared holds the declarations that say which strings are texts. It goes by names, not by types: a name is looked up
// in the directory of its use first, and then, when it is exported, in the others.
type declared struct {
	functions map[string]texts
	constants map[string]ast.Expr
	structs   map[string]int // the index of the field that holds a hint
}

// texts are the texts among a function's parameters, by index; -1: none.
type texts struct {
	failure int  // the text of the error that it returns
	format  bool // the text is a format, and arguments follow
	hint    int
	method  bool
}

func declarations(files []goFile) declared {
	d := declared{map[string]texts{}, map[string]ast.Expr{}, map[string]int{}}
	for _, f := range files {
		dir := path.Dir(f.path)
		for _, decl := range f.syntax.Decls {
			switch decl := decl.(type) {
			case *ast.FuncDecl:
				if t := textsOf(decl); t.failure >= 0 || t.hint >= 0 {
					record(d.functions, dir, decl.Name.Name, t)
				}
			case *ast.GenDecl:
				for _, s := range decl.Specs {
					d.add(dir, decl.Tok, s)
				}
			}
		}
	}
	return d
}

func (d declared) add(dir string, tok token.Token, s ast.Spec) {
	switch s := s.(type) {
	case *ast.ValueSpec:
		for i, name := range s.Names {
			if tok == token.CONST && i < len(s.Values) {
				record(d.constants, dir, name.Name, s.Values[i])
			}
		}
	case *ast.TypeSpec:
		if fields, ok := s.Type.(*ast.StructType); ok && hintField(fields) >= 0 {
			record(d.structs, dir, s.Name.Name, hintField(fields))
		}
	}
}

func record[T any](in map[string]T, dir, name string, v T) {
	in[dir+" "+name] = v
	if ast.IsExported(name) {
		in[name] = v
	}
}

func lookUp[T any](in map[string]T, dir, name string) (v T, ok bool) {
	if v, ok = in[dir+" "+name]; !ok && ast.IsExported(name) {
		v, ok = in[name]
	}
	return v, ok
}

// textsOf goes by the names of parameters. A function that returns an error and nothing else may take its text, or part
// of it; any function may take a hint.
func textsOf(decl *ast.FuncDecl) texts {
	t := texts{failure: -1, hint: -1, method: decl.Recv != nil}
	fails := returnsError(decl.Type)
	for i, p := range flatten(decl.Type.Params) {
		switch {
		case p.of == nil || !isNamed(p.of, "string"):
		case isHint(p.name):
			t.hint = i
		case fails && p.name == "format":
			t.failure, t.format = i, true
		case fails && t.failure < 0 && slices.Contains([]string{"msg", "message", "detail", "why", "what"}, p.name):
			t.failure = i
		}
	}
	return t
}

func isHint(name string) bool {
	return strings.EqualFold(name, "hint") || strings.EqualFold(name, "remedy")
}

// hintField returns the index of the field that holds a hint; -1: none.
func hintField(s *ast.StructType) int {
	return slices.IndexFunc(flatten(s.Fields), func(f field) bool { return isHint(f.name) })
}

type field struct {
	name string
	of   ast.Expr
}

// flatten returns each name of a list of parameters or fields its own entry; those without a name have an empty one.
func flatten(list *ast.FieldList) (all []field) {
	for _, f := range list.List {
		if f.Names == nil {
			all = append(all, field{"", f.Type})
		}
		for _, name := range f.Names {
			all = append(all, field{name.Name, f.Type})
		}
	}
	return all
}

func returnsError(f *ast.FuncType) bool {
	return f.Results.NumFields() == 1 && isNamed(f.Results.List[0].Type, "error", "Error", "Problem")
}

// isNamed reports whether a type or the type that it points to has one of the names, in any package.
func isNamed(t ast.Expr, names ...string) bool {
	switch t := t.(type) {
	case *ast.StarExpr:
		return isNamed(t.X, names...)
	case *ast.SelectorExpr:
		return slices.Contains(names, t.Sel.Name)
	case *ast.Ident:
		return slices.Contains(names, t.Name)
	}
	return false
}
