package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// figures are the measures of one package, over its files that are not tests.
type figures struct {
	pkg          string // its path below the module's; "." is the root
	files, lines int
	cycle        []string // the largest strongly connected set of files, sorted; a file alone is a cycle of one
	methods      int      // methods of the type with most, on T and *T together
	methodsOf    string
	functions    []function
	undocumented []string // exported names without a doc comment
}

// function is a declared function or method. Its lines run from the word func to the closing brace.
type function struct {
	name  string // f, or (T).f for both T and *T
	lines int
}

func (f figures) longest() function {
	if len(f.functions) == 0 {
		return function{}
	}
	return slices.MaxFunc(f.functions, func(a, b function) int { return cmp.Compare(a.lines, b.lines) })
}

// listed is one package as `go list -json` prints it.
type listed struct {
	ImportPath, Dir, Export string
	GoFiles                 []string
	Module                  *struct {
		Path string
		Main bool
	}
}

// measureModule measures the packages of the module in dir, without nested modules.
func measureModule(dir string) ([]figures, error) {
	all, err := list(dir)
	if err != nil {
		return nil, err
	}
	exports := map[string]string{}
	for _, p := range all {
		exports[p.ImportPath] = p.Export
	}
	set := token.NewFileSet()
	imports := importer.ForCompiler(set, "gc", func(path string) (io.ReadCloser, error) {
		if exports[path] == "" {
			return nil, fmt.Errorf("go list gave no export data of %s", path)
		}
		return os.Open(exports[path])
	})
	var measured []figures
	for _, p := range all {
		if p.Module == nil || !p.Module.Main || len(p.GoFiles) == 0 {
			continue
		}
		sources := map[string][]byte{}
		for _, name := range p.GoFiles {
			if sources[name], err = os.ReadFile(filepath.Join(p.Dir, name)); err != nil {
				return nil, err
			}
		}
		f, err := measure(set, imports, p.ImportPath, sources)
		if err != nil {
			return nil, fmt.Errorf("measuring %s: %w", p.ImportPath, err)
		}
		f.pkg = cmp.Or(strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, p.Module.Path), "/"), ".")
		measured = append(measured, f)
	}
	slices.SortFunc(measured, func(a, b figures) int { return cmp.Compare(a.pkg, b.pkg) })
	return measured, nil
}

// list compiles the module's packages and everything they import, so that each can be type-checked alone.
func list(dir string) (all []listed, err error) {
	cmd := exec.Command("go", "list", "-deps", "-export", "-json=ImportPath,Dir,Export,GoFiles,Module", "./...")
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("reading the output of go list: %w", err)
		}
		all = append(all, p)
	}
}

// measure parses and type-checks one package, given as the text of its files by name.
func measure(set *token.FileSet, imports types.Importer, path string, sources map[string][]byte) (figures, error) {
	f := figures{files: len(sources)}
	var files []*ast.File
	for name, text := range sources {
		file, err := parser.ParseFile(set, name, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return figures{}, err
		}
		files = append(files, file)
		f.lines += bytes.Count(text, []byte("\n"))
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	checked, err := (&types.Config{Importer: imports}).Check(path, set, files, info)
	if err != nil {
		return figures{}, err
	}
	f.cycle = largestCycle(uses(set, checked, files, info))
	f.measureDeclarations(set, files)
	return f, nil
}

// uses returns for each file the other files that declare something it uses. A selector of a field or a method is a use
// of that field or method, which go/types records beside the plain identifiers.
func uses(set *token.FileSet, pkg *types.Package, files []*ast.File, info *types.Info) map[string][]string {
	graph := map[string][]string{}
	for _, file := range files {
		graph[set.Position(file.Pos()).Filename] = nil
	}
	for id, object := range info.Uses {
		if object.Pkg() != pkg {
			continue
		}
		from, to := set.Position(id.Pos()).Filename, set.Position(object.Pos()).Filename
		if from != to && to != "" && !slices.Contains(graph[from], to) {
			graph[from] = append(graph[from], to)
		}
	}
	return graph
}

// largestCycle returns the largest strongly connected component of the graph, by Tarjan's algorithm. Of several as
// large it gives the one with the first file in order.
func largestCycle(graph map[string][]string) (largest []string) {
	index, low := map[string]int{}, map[string]int{} // order of the first visit, from 1; the earliest file it reaches
	var stack []string
	var visit func(string)
	visit = func(at string) {
		index[at], low[at] = len(index)+1, len(index)+1
		stack = append(stack, at)
		for _, next := range graph[at] {
			if index[next] == 0 {
				visit(next)
				low[at] = min(low[at], low[next])
			} else if slices.Contains(stack, next) {
				low[at] = min(low[at], index[next])
			}
		}
		if low[at] != index[at] {
			return
		}
		from := slices.Index(stack, at)
		cycle := slices.Sorted(slices.Values(stack[from:]))
		stack = stack[:from]
		if len(cycle) > len(largest) || len(cycle) == len(largest) && cycle[0] < largest[0] {
			largest = cycle
		}
	}
	for at := range graph {
		if index[at] == 0 {
			visit(at)
		}
	}
	return largest
}

// measureDeclarations counts methods, lines of functions and undocumented names.
func (f *figures) measureDeclarations(set *token.FileSet, files []*ast.File) {
	methods := map[string]int{}
	for _, file := range files {
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				name, receiver := d.Name.Name, receiverOf(d)
				exported := ast.IsExported(name)
				if receiver != "" {
					methods[receiver]++
					exported = exported && ast.IsExported(receiver)
					name = "(" + receiver + ")." + name
				}
				f.functions = append(f.functions, function{name, set.Position(d.End()).Line - set.Position(d.Pos()).Line + 1})
				if exported && d.Doc.Text() == "" {
					f.undocumented = append(f.undocumented, name)
				}
			case *ast.GenDecl:
				f.undocumented = append(f.undocumented, undocumented(d)...)
			}
		}
	}
	for name, n := range methods {
		if n > f.methods || n == f.methods && name < f.methodsOf {
			f.methods, f.methodsOf = n, name
		}
	}
}

// receiverOf returns the name of the type that a method is declared on, without its star and type parameters.
func receiverOf(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return ""
	}
	t := d.Recv.List[0].Type
	for {
		switch of := t.(type) {
		case *ast.StarExpr:
			t = of.X
		case *ast.ParenExpr:
			t = of.X
		case *ast.IndexExpr:
			t = of.X
		case *ast.IndexListExpr:
			t = of.X
		case *ast.Ident:
			return of.Name
		default:
			panic("structure: a receiver that the parser should have refused")
		}
	}
}

// undocumented returns the exported names of a declaration of types, constants or variables that have no comment of
// their own, above or beside, and none above their group.
func undocumented(d *ast.GenDecl) (names []string) {
	for _, s := range d.Specs {
		switch s := s.(type) {
		case *ast.TypeSpec:
			if s.Name.IsExported() && d.Doc.Text() == "" && s.Doc.Text() == "" && s.Comment.Text() == "" {
				names = append(names, s.Name.Name)
			}
		case *ast.ValueSpec:
			for _, name := range s.Names {
				if name.IsExported() && d.Doc.Text() == "" && s.Doc.Text() == "" && s.Comment.Text() == "" {
					names = append(names, name.Name)
				}
			}
		}
	}
	return names
}
