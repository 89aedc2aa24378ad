// Handwritten digits in Go: the model of digits_numpy.py, with Adam on a stepwire server.
//
//	python examples/export_digits.py digits.json
//	examples/go/build
//	examples/go/digits [-cut STEP] localhost:50051 digits.json
//
// -cut breaks the stream off twice, before the commit of the step and after the commit of the next one. The client
// attaches again and goes on; the parameters at the end are those of an undisturbed training, to the bit.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"

	"google.golang.org/grpc/status"

	pb "stepwire.example/digits/stepwirev1"
)

const (
	greys         = 16
	chunkElements = 1024 // small, so that gradients and replies have several chunks
)

type images struct {
	Greys  [][]float64 `json:"greys"`
	Digits []int       `json:"digits"`
}

type data struct {
	Lr      float64 `json:"lr"`
	Train   images  `json:"train"`
	Test    images  `json:"test"`
	Tensors []struct {
		Name   string    `json:"name"`
		Shape  []uint64  `json:"shape"`
		Values []float32 `json:"values"`
	} `json:"tensors"`
	Batches [][]int `json:"batches"`
}

type summary struct {
	Steps        int     `json:"steps"`
	FirstLoss    float64 `json:"first_loss"`
	LastLoss     float64 `json:"last_loss"`
	TestAccuracy float64 `json:"test_accuracy"`
	Attached     int     `json:"attached"`
	Replayed     int     `json:"replayed"`
	Parameters   string  `json:"parameters"`
}

// model is a network with one hidden layer and softmax cross-entropy; parameters and gradients are flat.
type model struct {
	inputs, hidden, outputs int
	parameters              []float32
}

// offsets returns where w1, b1, w2 and b2 begin in the flat arrays.
func (m *model) offsets() (w1, b1, w2, b2 int) {
	b1 = m.inputs * m.hidden
	w2 = b1 + m.hidden
	return 0, b1, w2, w2 + m.hidden*m.outputs
}

// affine returns x · weights + bias, with both in the parameters.
func (m *model) affine(x []float64, weights, bias, outputs int) []float64 {
	sums := make([]float64, outputs)
	for j := range sums {
		sums[j] = float64(m.parameters[bias+j])
	}
	for i, value := range x {
		if value == 0 {
			continue
		}
		row := m.parameters[weights+i*outputs:]
		for j := range sums {
			sums[j] += value * float64(row[j])
		}
	}
	return sums
}

// forward returns the activations of the hidden layer and the logits of one image.
func (m *model) forward(image []float64) (active, logits []float64) {
	w1, b1, w2, b2 := m.offsets()
	active = m.affine(image, w1, b1, m.hidden)
	for j, value := range active {
		active[j] = math.Max(value, 0)
	}
	return active, m.affine(active, w2, b2, m.outputs)
}

// lossAndGradient returns the mean loss of some images, and its gradient.
func (m *model) lossAndGradient(set images, chosen []int) (float64, []float32) {
	w1, b1, w2, b2 := m.offsets()
	sums := make([]float64, len(m.parameters))
	loss := 0.0
	for _, index := range chosen {
		active, logits := m.forward(set.Greys[index])
		loss += softmaxErrors(logits, set.Digits[index])
		back := make([]float64, m.hidden)
		for j, value := range active {
			if value > 0 {
				for k, e := range logits {
					back[j] += e * float64(m.parameters[w2+j*m.outputs+k])
				}
			}
		}
		accumulate(sums, w2, b2, active, logits)
		accumulate(sums, w1, b1, set.Greys[index], back)
	}
	gradient := make([]float32, len(sums))
	for i, sum := range sums {
		gradient[i] = float32(sum / float64(len(chosen)))
	}
	return loss / float64(len(chosen)), gradient
}

// softmaxErrors returns the loss of one image, and replaces its logits by the gradient of the loss.
func softmaxErrors(logits []float64, digit int) float64 {
	largest, sum := logits[argmax(logits)], 0.0
	for _, logit := range logits {
		sum += math.Exp(logit - largest)
	}
	loss := math.Log(sum) + largest - logits[digit]
	for k, logit := range logits {
		logits[k] = math.Exp(logit-largest) / sum
	}
	logits[digit]--
	return loss
}

// accumulate adds the gradient of one image: the outer product of inputs and errors, and the errors themselves.
func accumulate(sums []float64, weights, bias int, inputs, errors []float64) {
	for i, value := range inputs {
		if value != 0 {
			for j, e := range errors {
				sums[weights+i*len(errors)+j] += value * e
			}
		}
	}
	for j, e := range errors {
		sums[bias+j] += e
	}
}

func argmax(values []float64) int {
	best := 0
	for i, value := range values {
		if value > values[best] {
			best = i
		}
	}
	return best
}

// accuracy returns the fraction of images that are classified right.
func (m *model) accuracy(set images) float64 {
	right := 0
	for i, image := range set.Greys {
		if _, logits := m.forward(image); argmax(logits) == set.Digits[i] {
			right++
		}
	}
	return float64(right) / float64(len(set.Greys))
}

func readData(path string) (*data, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var read data
	if err := json.Unmarshal(text, &read); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, set := range []images{read.Train, read.Test} {
		for _, image := range set.Greys {
			for i := range image {
				image[i] /= greys
			}
		}
	}
	return &read, nil
}

func train(target string, data *data, cut uint64) (*summary, error) {
	network := &model{
		inputs: int(data.Tensors[0].Shape[0]), hidden: int(data.Tensors[0].Shape[1]),
		outputs: int(data.Tensors[3].Shape[0]),
	}
	var tensors []*pb.TensorSpec
	for _, tensor := range data.Tensors {
		tensors = append(tensors, &pb.TensorSpec{Name: tensor.Name, Shape: tensor.Shape})
		network.parameters = append(network.parameters, tensor.Values...)
	}
	session, err := CreateSession(target, tensors, network.parameters, data.Lr, chunkElements)
	if err != nil {
		return nil, err
	}
	if cut > 0 {
		session.CutBefore, session.CutAfter = cut, cut+1
	}
	var told summary
	for step, batch := range data.Batches {
		loss, gradient := network.lossAndGradient(data.Train, batch)
		if step == 0 {
			told.FirstLoss = loss
		}
		if network.parameters, err = session.Step(gradient); err != nil {
			return nil, err
		}
		told.Steps, told.LastLoss = step+1, loss
	}
	if err := session.Close(); err != nil {
		return nil, err
	}
	_, bytes := chunkOf(network.parameters, 0, len(network.parameters))
	digest := sha256.Sum256(bytes)
	told.TestAccuracy = network.accuracy(data.Test)
	told.Attached, told.Replayed, told.Parameters = session.Attached, session.Replayed, hex.EncodeToString(digest[:])
	return &told, nil
}

func main() {
	cut := flag.Uint64("cut", 0, "the step at which the stream is broken off; 0 for none")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: digits [-cut STEP] HOST:PORT digits.json")
		os.Exit(2)
	}
	data, err := readData(flag.Arg(1))
	if err == nil {
		var told *summary
		if told, err = train(flag.Arg(0), data, *cut); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(told)
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "digits: %s: %s\n", reasonOf(err), status.Convert(err).Message())
		os.Exit(1)
	}
}
