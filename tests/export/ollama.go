// Reads Modelfiles and writes conversations as Ollama 0.33 does, on the standard library alone.
//
// In: a JSON list of {"modelfile": text, "conversations": [[{"role", "content"}]]}; out: for each
// {"stops", "prompts", "errors"}. Ends with 1 and a line where a Modelfile is not read.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type order struct {
	Modelfile     string
	Conversations [][]message
}

type answer struct {
	Stops   []string `json:"stops"`
	Prompts []string `json:"prompts"`
	Errors  []string `json:"errors"`
}

func main() {
	var orders []order
	must(json.NewDecoder(os.Stdin).Decode(&orders))
	answers := []answer{}
	for _, order := range orders {
		answers = append(answers, carriedOut(order))
	}
	must(json.NewEncoder(os.Stdout).Encode(answers))
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func carriedOut(o order) (a answer) {
	system, text := "", ""
	for _, said := range read(o.Modelfile) {
		switch said.name {
		case "FROM":
		case "TEMPLATE":
			text = said.value
		case "SYSTEM":
			system = said.value
		case "PARAMETER stop":
			a.Stops = append(a.Stops, said.value)
		default:
			must(fmt.Errorf("no such instruction: %s", said.name))
		}
	}
	parsed, err := template.New("").Option("missingkey=zero").Parse(text)
	must(err)
	for _, messages := range o.Conversations {
		if system != "" && messages[0].Role != "system" {
			messages = append([]message{{"system", system}}, messages...)
		}
		var prompt strings.Builder
		problem := ""
		if err := parsed.Execute(&prompt, values(messages)); err != nil {
			problem = err.Error()
		}
		a.Prompts = append(a.Prompts, prompt.String())
		a.Errors = append(a.Errors, problem)
	}
	return a
}

// values is what a template sees: messages of one role that follow one another are one, and all
// system messages are told once more.
func values(messages []message) map[string]any {
	var joined []*message
	var system []string
	for _, said := range messages {
		if said.Role == "system" {
			system = append(system, said.Content)
		}
		if n := len(joined); n > 0 && joined[n-1].Role == said.Role && said.Role != "tool" {
			joined[n-1].Content += "\n\n" + said.Content
			continue
		}
		joined = append(joined, &message{said.Role, said.Content})
	}
	return map[string]any{
		"Messages": joined, "System": strings.Join(system, "\n\n"), "Response": "",
	}
}

type instruction struct{ name, value string }

// read splits a Modelfile into what it says. A value ends with the first line that leaves no quote
// open. Nothing in quotes is an escape, and what cannot be printed is lost, blanks aside.
func read(text string) (said []instruction) {
	for text = strings.TrimLeft(text, " \t\r\n"); text != ""; {
		name, rest, _ := strings.Cut(text, " ")
		if name == "PARAMETER" {
			parameter, value, _ := strings.Cut(rest, " ")
			name, rest = name+" "+parameter, value
		}
		var kept strings.Builder
		value, closed, end := "", false, len(rest)
		for at, r := range rest {
			if r == '\n' || r == '\r' {
				if value, closed = unquoted(kept.String()); closed {
					end = at
					break
				}
			}
			if strconv.IsPrint(r) || strings.ContainsRune("\t\r\n", r) {
				kept.WriteRune(r)
			}
		}
		if !closed {
			if value, closed = unquoted(kept.String()); !closed {
				must(fmt.Errorf("a quote stays open: %s", kept.String()))
			}
		}
		said = append(said, instruction{name, value})
		text = strings.TrimLeft(rest[end:], " \t\r\n")
	}
	return said
}

func unquoted(text string) (string, bool) {
	text = strings.TrimSpace(text)
	for _, quote := range []string{`"""`, `"`} {
		if inner, quoted := strings.CutPrefix(text, quote); quoted {
			return strings.CutSuffix(inner, quote)
		}
	}
	return text, true
}
